"""The field and the default solver on a CPU in C++: built when the package is installed, called through ctypes.

``build`` makes one library for each set of instructions, and ``library`` loads the best one that this processor knows.
"""
