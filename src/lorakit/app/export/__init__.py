"""`lorakit export` and `lorakit merge`: what other programs read."""
