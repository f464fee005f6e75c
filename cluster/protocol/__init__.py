"""What processes say to each other, and the words they share. Frozen values; imports nothing of ours."""
