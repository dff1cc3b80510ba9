"""CUDA: memory of GPUs as seen by several processes of one host, and who may write it when."""
