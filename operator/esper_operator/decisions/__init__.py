"""What is to be done, as pure functions of what is observed: one policy a file.

None of them reads a clock or makes a request; times come in with what is observed.
"""
