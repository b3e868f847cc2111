"""Which failures of training are seen, by which figure, and how soon: the theme `failures` of the benchmarks."""
