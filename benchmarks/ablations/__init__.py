"""How the k-means start, the miner and the regularizer change retrieval of CLINC150, trained with ten domains."""
