"""Model families: each a file that reads like its paper, and a row in `registry`."""
