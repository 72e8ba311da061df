"""clipkit/cli"""
