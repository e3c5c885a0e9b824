"""`lorakit serve`: adapters over HTTP."""
