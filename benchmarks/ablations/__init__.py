"""What the k-means start, the miner and the regularizer do to retrieval of CLINC150, trained with its ten domains."""
