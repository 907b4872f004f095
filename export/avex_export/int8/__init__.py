"""Int8: the transformers' products in 8-bit integers, about twice as fast on a CPU and a third of the size.

`products` rounds a product, `rounding` chooses the integers of its weights, `clips` finds what to listen to
meanwhile, and `gates` decides whether the result may be shipped; `build` puts them together. The recipe and its
reasons: docs/decisions/int8.md.
"""
