"""One job on many devices: the mesh they form, and where each array lies on it."""
