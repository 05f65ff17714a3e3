"""`llava batch`: many pictures in, one file of answers out that outlives whatever stops the run."""
