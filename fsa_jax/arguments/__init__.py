"""What users pass in: the types of arguments, the checks of them, and the messages of the checks.

The public functions and constructors call the checks first and pass on what these return: plain
Python numbers and canonical arrays. `types` and `scalars` import nothing of this package, so that
configurations use them; `checks` knows the configurations too.
"""
