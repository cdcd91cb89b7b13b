"""Train weight-sparse transformers and cut circuits out of them."""
