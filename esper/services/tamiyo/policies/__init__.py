"""One decision policy a file, each a pure function of the packet and its analysed graph."""
