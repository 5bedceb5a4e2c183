"""Container images: what goes into them, how they are built, how a cluster gets them."""
