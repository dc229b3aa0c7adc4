import sys
sys.path.insert(0,'/tmp')
from mkdata import small as small_data_set
