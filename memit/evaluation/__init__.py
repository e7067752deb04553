"""How well an edit took: one file for each data set or family of metrics."""
