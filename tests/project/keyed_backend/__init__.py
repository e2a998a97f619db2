"""A database backend with additional keys in `OPTIONS`, like backends with a pool."""
