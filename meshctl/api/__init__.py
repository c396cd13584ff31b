"""What people write: the typed objects of `meshctl.io/v1alpha1` and the input of `meshctl solve`.

The package turns text into validated objects and those into the core's vocabulary. It watches nothing and talks to
nobody; the directory and the Kubernetes API are adapters that use it.
"""
