"""From a recipe to a run folder, and from a run folder to answers. Prints nothing: the caller is told through events."""
