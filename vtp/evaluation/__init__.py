"""What a tokenizer knows and what it gives: evaluators take callables and data, return numbers; `run` opens files."""
