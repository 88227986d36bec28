"""What solving weights layer by layer needs: a walk over the graph, token weights, files."""
