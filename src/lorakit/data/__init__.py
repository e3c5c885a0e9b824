"""From files of many formats to one kind of `Example`, and from examples to batches. Knows no model."""
