"""The methods of condense_kernels.methods, restated from their papers in numpy, in fp64, for one image.

One file and one function for each method, of the same names. A function gets features [N, D], scores [N], keep and the
method's other arguments as numpy arrays, and returns the rows in picture order: (merged [K, D], indices [K],
assignment [N], mass [K]). Loops over tokens are welcome. Nothing of condense_kernels is imported here.
"""
