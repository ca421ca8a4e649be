"""Images and labels read together, for training. Nothing here yet but the name of the package."""
