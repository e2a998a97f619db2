"""The tests of other packages, run with nothing but the channel layer exchanged."""
