"""clipkit/jobs"""
