"""The loss with its gradient written out, some classes at a time.

Plain autograd keeps several tensors of the size of all similarities. Here, chunks of classes are small enough to stay
in a processor's cache from the matrix product that writes their similarities to the one that reads their gradient.
Backward finds what it needs of each chunk kept, or computes it once more. Both are exact.

Tensors over classes and proxies have the batch last, ``(c, B)`` and ``(c, K, B)``: what runs over the proxies of a
class then runs along rows of the memory, and the matrix products are faster, too.
"""
