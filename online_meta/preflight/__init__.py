"""Check a model before training: are its meta-gradients right, and which layer makes them wrong?"""
