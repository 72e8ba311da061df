"""clipkit/interop"""
