"""Joint pre-training of a visual tokenizer: align with text, distil itself, reconstruct."""
