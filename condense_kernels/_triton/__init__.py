"""What the Triton kernels share: device functions, the tables of how each is launched, their working memory."""
