"""Stage 2: images to latents, a diffusion transformer on them, and pictures out of it. Meets stage 1 only in files."""
