"""What train.py is made of: batches of triples, the loss, a dev set, the log, checkpoints, the folder it writes."""
