"""A database backend with keys of its own in `OPTIONS`, as those that pool connections have them."""
