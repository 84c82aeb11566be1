"""Pages about runs: one self-contained HTML file, and the same figures as a table in the terminal. Reads files only."""
