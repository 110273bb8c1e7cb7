"""Is a checkpoint sound, and what would servers make of it? Finds every fault, and stops at none.

Owns the finding of faults in files, names, shapes, values and configs. It refuses to own what a fault means
(`faults.py`), what a server makes of it (`readings.py`), and to mend anything.
"""
