"""How to run any learner: the loop, its optimiser, its checkpoints, its log. Knows nothing of images or losses."""
