"""`lorakit sweep`: one recipe at many points."""
