"""clipkit/page"""
