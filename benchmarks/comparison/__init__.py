"""What `compare.py` is made of: tasks, the training of one model, tables and plots."""
