"""Tasks that a T5 answers in text: formats, spelling, constrained decoding."""
