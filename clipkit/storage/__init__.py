"""clipkit/storage"""
