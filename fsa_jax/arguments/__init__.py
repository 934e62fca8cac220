"""The types of the arguments of public functions, and checks with messages for users.

The public functions and constructors first call the checks, then work with the plain Python numbers
and canonical arrays that the checks return. `types` and `scalars` import nothing else from this
package, so that configurations can use them; `checks` imports the configurations too.
"""
