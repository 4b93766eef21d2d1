"""What single parts of the package do to retrieval, on sentence features of CLINC150."""
