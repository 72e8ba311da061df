"""clipkit/pixels"""
