"""How the shipped checkpoint was found: runs on one GPU, and the dual encoder and the linear probe beside it."""
