"""The definitions in numpy: networks and derivatives, the interpreter of tapes, noise. They judge everything faster."""
