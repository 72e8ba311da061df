"""clipkit/text"""
