"""From checkpoint files to this rank's slices, with proof that nothing is missing."""
