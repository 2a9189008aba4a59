"""Time of a training step of distloop beside other loops that train the same; see __main__.py."""
