"""clipkit/formats"""
